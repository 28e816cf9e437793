"""A page in the browser in which videos are generated live; only `page` needs gradio."""
