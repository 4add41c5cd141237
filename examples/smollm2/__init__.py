"""SmolLM2-135M-Instruct, and the simulated people who rate it."""
