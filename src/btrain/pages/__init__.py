"""Pages, tables and pictures for people, of the report, the paper's sheets and the bench."""
