"""The pipeline from a recipe to a finished run: parsing, planning, running, comparing, exporting."""
