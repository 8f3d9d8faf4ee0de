"""The paper's tables and figures: what each consists of, its runs, and what they say."""
