"""Settings of known trainings, one YAML file each over a shared base."""
