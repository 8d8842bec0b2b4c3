"""The paper's figures and tables, one file each, one command each."""
