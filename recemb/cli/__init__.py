"""The ``recemb`` command: ``main.py`` and one file per verb.

A verb file has ``add_parser(subparsers)``, which may import only the standard library, and
``run(args) -> int``, which returns the exit code and imports what it needs when it runs.
"""
