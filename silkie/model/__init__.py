"""What differs between vision-language models, and the one forward pass."""
