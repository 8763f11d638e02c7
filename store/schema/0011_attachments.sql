-- Attachments, pre-header and text parts that are made from the HTML part
-- depends: 0010_fallback_servers

-- migrate: apply

create table attachments (
    id bigint generated always as identity primary key,
    campaign_id bigint not null references campaigns on delete cascade,
    filename text not null,
    content_type text not null,
    content_id text not null default '',     -- empty: not referred to from the HTML part
    content bytea not null,
    created_at timestamptz not null default now()
);
alter table attachments alter column content set storage external;   -- images and PDFs do not shrink
create index attachments_campaign on attachments (campaign_id, id);

alter table campaigns
    add column preheader text not null default '',               -- a template
    add column text_derived boolean not null default false;      -- the text part follows the HTML part

-- migrate: rollback
-- None: the schema only goes forward. A release that has to go back restores the backup made before it.
