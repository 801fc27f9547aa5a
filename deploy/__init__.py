"""What users touch: the OpenAI API, the command line, metrics."""
