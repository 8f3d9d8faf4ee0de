"""Pages, tables and pictures for people: what the report and the paper's sheets share."""
