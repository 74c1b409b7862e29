"""How it is deployed: images, manifests, a local stack, dashboards."""
