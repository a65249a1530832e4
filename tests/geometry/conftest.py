from hypothesis import settings

# The same examples in every run, and no deadline: a shared runner may stall for longer than any useful one.
settings.register_profile("geometry", derandomize=True, deadline=None)
settings.load_profile("geometry")
