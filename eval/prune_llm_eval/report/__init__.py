"""Reports to decide from: gathered once as JSON, then rendered as text, tables and pictures.

`gathering.py` measures and makes the JSON; everything else makes text of JSON and nothing more, so
that a report.json can be rendered again.
"""
