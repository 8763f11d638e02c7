-- When a part was handed in: raw messages are signed as of then, so every attempt sends the same octets
-- depends: 0018_forwards

-- migrate: apply

alter table message_parts add column created_at timestamptz not null default now();

-- migrate: rollback
-- None: the schema only goes forward. A release that has to go back restores the backup made before it.
