"""KubeRay manifests, and RayJobs made of them.

Imports nothing of this tree.
"""
