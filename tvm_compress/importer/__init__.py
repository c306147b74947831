"""From files of other frameworks to canonical modules."""
