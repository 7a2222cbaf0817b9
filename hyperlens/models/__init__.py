"""Opening hub ids, folders, adapters and objects; model structure; weight-sharing copies."""
