"""``python -m recemb`` is the ``recemb`` command."""

from recemb.cli.main import entry_point

if __name__ == "__main__":
    entry_point()
