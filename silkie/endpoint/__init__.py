"""OpenAI-compatible endpoints: client, budget, media. Shared by `silkie.feedback` and `silkie.evaluation`."""
