"""Pages of HTML that need nothing beside them: plain functions, data in and a string out."""
