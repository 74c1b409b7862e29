"""KubeRay manifests, and RayJobs made of them."""
