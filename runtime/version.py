"""The version that a controller and its workers must share."""

VERSION = "0.1.0"
"""Equal to the version in pyproject.toml; a constant, because a job's working directory is not an installed package."""
