"""How it is deployed: images, manifests, a local stack, dashboards.

Imported is `runtime` alone, and by everybody above.
"""
