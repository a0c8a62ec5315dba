"""Where fusing pays and where it costs: times a site, break-even, and the change predicted for a model's step."""
