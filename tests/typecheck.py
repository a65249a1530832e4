"""The runtime type checker of the tests: pyproject.toml hands it to jaxtyping, production never sees it."""

from beartype import BeartypeConf, beartype

# As in static checks, an int is good where a float is asked for.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
