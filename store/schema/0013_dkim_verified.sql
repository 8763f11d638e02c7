-- Whose domain it is: the record of a DKIM key was found in the DNS
-- depends: 0012_seeds

-- migrate: apply

alter table dkim_keys add column verified_at timestamptz;   -- when its record was found last; null: never, or gone

-- migrate: rollback
-- None: the schema only goes forward. A release that has to go back restores the backup made before it.
