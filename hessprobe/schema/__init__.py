"""How things are declared: checked settings, and tables of labelled variables."""
