"""The OpenAI API over HTTP: `app.create_app` needs an engine client and a tokenizer, and knows nothing of Ray."""
