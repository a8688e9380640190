"""How gates mix prompts: figures, plots, `inspect-gates`."""
