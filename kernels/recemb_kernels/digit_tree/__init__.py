"""The driver that every CPU look-up shares: ids as digits, grouped into a tree of prefixes."""
