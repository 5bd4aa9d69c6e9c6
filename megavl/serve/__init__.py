"""A server that speaks OpenAI's HTTP interface, with a chat page."""
