"""One conditional flow for all data sets of a form: trained on the model's own simulations, weighed for each."""
