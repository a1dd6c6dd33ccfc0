"""The name under which scripts outside this repository import InputError; it lives in common/cli.py."""

from common.cli import InputError

__all__ = ["InputError"]
