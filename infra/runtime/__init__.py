"""The ground that serving and pipelines both stand on."""
