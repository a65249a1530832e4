"""Cache specs shipped with bevkd: declarative YAML files only, looked up by ``bevkd.cache.spec.load_spec``."""
