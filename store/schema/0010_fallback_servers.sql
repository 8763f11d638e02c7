-- The delivery server of the same user that takes over while one cannot be used
-- depends: 0009_bounce_patterns

-- migrate: apply

alter table delivery_servers add column fallback_server_id bigint references delivery_servers check (fallback_server_id <> id);

-- migrate: rollback
-- None: the schema only goes forward. A release that has to go back restores the backup made before it.
