"""Edge to the Kubernetes API: reading a cluster, and changing it so that it is always put back."""
