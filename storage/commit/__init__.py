"""What makes a shard exist and proves it whole: records, seal, claims, and the errors for damage."""
