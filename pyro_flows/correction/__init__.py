"""The last rung: samplers that finish the work of a flow, in the flow's own latent space."""
