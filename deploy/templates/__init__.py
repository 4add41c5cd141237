"""Jinja2 templates of the card, and the style that the report shares."""
