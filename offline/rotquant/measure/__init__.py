"""What a model is worth: perplexity, comparisons of recipes, online cost, inspection of activations."""
