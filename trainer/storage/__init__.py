"""Places: folders and files of this machine, and objects of Google Cloud Storage, by the same few words."""
