"""Measurements that any user can run: ``bevkd bench``."""
