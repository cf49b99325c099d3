__import__("setuptools").setup()  # the metadata is in pyproject.toml
