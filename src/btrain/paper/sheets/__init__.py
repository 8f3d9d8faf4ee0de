"""The paper's tables and figures beside the paper's own numbers, from plans and run folders."""
