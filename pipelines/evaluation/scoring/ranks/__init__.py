"""The processes of one run of scoring, and what each of them measures."""
