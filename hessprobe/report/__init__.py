"""From a log to one page, figures and terminal tables."""
