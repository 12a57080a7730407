"""Man pages and shell completions out of the programs' own parsers: ``commands``, ``roff``, ``completions``."""
