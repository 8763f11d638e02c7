-- AMP parts of campaigns
-- depends: 0015_conversions

-- migrate: apply

alter table campaigns add column amp text not null default '';   -- a template

-- migrate: rollback
-- None: the schema only goes forward. A release that has to go back restores the backup made before it.
