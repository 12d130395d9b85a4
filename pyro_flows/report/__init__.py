"""A page to send: verdict, table, figures, checks, settings and how to reproduce, in one HTML file."""
