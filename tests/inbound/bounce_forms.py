"""Reports in prose as mail systems of many makes write them: forms written down from knowledge of the makes, with invented names.

Each: name, From, Subject, body, recipients, hard (None: not said), categories that are right.
"""
# ruff: noqa: E501

MAILBOX = ("bad-mailbox",)
FULL = ("quota-issues",)
GONE = ("bad-mailbox", "inactive-mailbox")
UNREACHED = ("message-expired", "no-answer-from-host", "routing-errors")

RETURNED = """Received: from app1.sluice.example (app1.sluice.example [192.0.2.10])
	by mta1.sluice.example with ESMTPS id 1a2b; Tue, 04 Mar 2025 09:12:01 +0000
From: News <news@sluice.example>
To: <{to}>
Subject: Your weekly offers
Message-ID: <m1@sluice.example>
MIME-Version: 1.0

Hello
"""

FORMS: list[tuple[str, str, str, str, list[str], bool | None, tuple[str, ...]]] = [
    ("activehunter", "MAILER-DAEMON@ah.example", "Returned mail: see transcript for details",
     "  ----- The following addresses had permanent fatal errors -----\n\n>>> mona@ah.example <mona@ah.example>\n\n  ----- Transcript of session follows -----\n550 sorry, no mailbox here by that name (#5.1.1 - chkusr)\n",
     ["mona@ah.example"], True, MAILBOX),
    ("james", "postmaster@james.example", "Re: Your weekly offers",
     "Hi. This is the James mail server at james.example.\nI'm afraid I wasn't able to deliver your message to the following addresses.\nThis is a permanent error; I've given up. Sorry it didn't work out. Below\nI include the list of recipients and the reason why I was unable to deliver\nyour message.\n\nFailed recipient(s):\nnils@james.example\n\nError message:\n550 5.1.1 The user does not exist\n",
     ["nils@james.example"], True, MAILBOX),
    ("biglobe", "Mail Administrator <postmaster@biglobe.example>", "Returned mail",
     "   ----- The following addresses had delivery problems -----\n olga@biglobe.example\n\n   ----- Non-delivered information -----\n The number of messages in recipient's mailbox exceeded the local limit.\n",
     ["olga@biglobe.example"], False, FULL),
    ("courier", "\"Courier mail server at mx.courier.example\" <@>", "NOTICE: mail delivery status.",
     "This is a delivery status notification from mx.courier.example,\nrunning the Courier mail server, version 0.65.2.\n\nThe original message was received on Tue, 04 Mar 2025 10:00:00 +0000\nfrom mta1.sluice.example (mta1.sluice.example [192.0.2.25])\n\n---------------------------------------------------------------------------\n\n                           UNDELIVERABLE MAIL\n\nYour message to the following recipients cannot be delivered:\n\n<paul@courier.example>:\n    mx.courier.example [203.0.113.5]:\n>>> RCPT TO:<paul@courier.example>\n<<< 550 5.1.1 <paul@courier.example>... User Unknown\n\n---------------------------------------------------------------------------\n",
     ["paul@courier.example"], True, MAILBOX),
    ("domino", "Mail Router <postmaster@domino.example>", "DELIVERY FAILURE: User quinn (quinn@domino.example) not listed in Domino Directory",
     "Your message\n\n  Subject: Your weekly offers\n\nwas not delivered to:\n\n  quinn@domino.example\n\nbecause:\n\n  User quinn (quinn@domino.example) not listed in Domino Directory\n",
     ["quinn@domino.example"], True, MAILBOX),
    ("einsundeins", "Mail Delivery System <mailer-daemon@1und1.example>", "Mail delivery failed: returning message to sender",
     "This message was created automatically by mail delivery software.\n\nA message that you sent could not be delivered to one or more of its\nrecipients. This is a permanent error. The following address(es) failed:\n\nrosa@1und1.example:\nMail quota exceeded.\n\n--- The header of the original message is following. ---\n\n",
     ["rosa@1und1.example"], False, FULL),
    ("exchange2003", "System Administrator <postmaster@ex.example>", "Undeliverable: Your weekly offers",
     "Your message\n\n  To:      sven@ex.example\n  Subject: Your weekly offers\n  Sent:    Tue, 4 Mar 2025 10:00:00 +0000\n\ndid not reach the following recipient(s):\n\nsven@ex.example on Tue, 4 Mar 2025 10:00:01 +0000\n    The recipient name is not recognized\n\tThe MTS-ID of the original message is: c=de;a= ;p=ex;l=EX1\n    MSEXCH:IMS:EX:SITE:EX1 0 (000C05A6) Unknown Recipient\n",
     ["sven@ex.example"], True, MAILBOX),
    ("exchange2007 fr", "Postmaster <postmaster@ex7.example>", "Non remis : Vos offres",
     "\u00c9chec de remise pour ces destinataires ou listes de distribution\u00a0:\n\ntara@ex7.example\nL'adresse de messagerie que vous avez entr\u00e9e est introuvable. V\u00e9rifiez l'adresse et r\u00e9essayez.\n\nInformations de diagnostic pour les administrateurs\u00a0:\n\nServeur de g\u00e9n\u00e9ration\u00a0: ex7.example\n\ntara@ex7.example\n#550 5.1.1 RESOLVER.ADR.RecipNotFound; not found ##\n\nEn-t\u00eates des messages d'origine\u00a0:\n\n",
     ["tara@ex7.example"], True, MAILBOX),
    ("ezweb", "<Postmaster@ezweb.example>", "Mail System Error - Returned Mail",
     "The user(s) account is temporarily over quota.\n\n<uwe@ezweb.example>\n\n", ["uwe@ezweb.example"], False, FULL),
    ("gmx", "GMX Mailer Daemon <mailer-daemon@gmx.example>", "Mail delivery failed: returning message to sender",
     "This message was created automatically by mail delivery software.\n\nA message that you sent could not be delivered to\none or more of its recipients. This is a permanent error.\nThe following address failed:\n\n\"vera@gmx.example\":\nSMTP error from remote server after RCPT command:\nhost: mx.gmx.example\n5.1.1 <vera@gmx.example>... User Unknown\n",
     ["vera@gmx.example"], True, MAILBOX),
    ("imail", "Postmaster <postmaster@imail.example>", "Undeliverable Mail",
     "Unknown user: willi@imail.example\n\nOriginal message follows.\n\n", ["willi@imail.example"], True, MAILBOX),
    ("imail attempts", "Postmaster <postmaster@imail.example>", "Undeliverable Mail",
     "Delivery failed 20 attempts: xaver@imail.example\n\nOriginal message follows.\n\n", ["xaver@imail.example"], False, UNREACHED),
    ("interscan", "\"InterScan MSS\" <postmaster@ism.example>", "Mail delivery failed: Message could not be delivered",
     "Sent >>> RCPT TO:<yara@ism.example>\nReceived <<< 550 5.1.1 <yara@ism.example>... user unknown\n\nCould not deliver message.\nUnable to deliver message to <yara@ism.example>\n",
     ["yara@ism.example"], True, MAILBOX),
    ("kddi", "<no-reply@kddi.example>", "Mail System Error - Returned Mail",
     "Your mail sent on: Tue, 4 Mar 2025 10:00:00\n    Could not be delivered to: <zoe@kddi.example>\n    As their mailbox is full.\n", ["zoe@kddi.example"], False, FULL),
    ("mailfoundry", "Mail Delivery Subsystem <MAILER-DAEMON@mf.example>", "Message delivery has failed",
     "Unable to deliver message to: <adam@mf.example>\nDelivery failed for the following reason:\nServer mx22.mf.example[192.0.2.222] failed with: 550 <adam@mf.example> No such user here\n\nThis has been a permanent failure.  No further delivery attempts will be made.\n",
     ["adam@mf.example"], True, MAILBOX),
    ("mailmarshal", "\"MailMarshal\" <postmaster@mm.example>", "Undeliverable Mail: \"Your weekly offers\"",
     "Your message:\n   From:    news@sluice.example\n   Subject: Your weekly offers\n\nCould not be delivered because of\n\n550 5.1.1 User unknown\n\nThe following recipients were affected: \n    bert@mm.example\n\nAdditional Information\n",
     ["bert@mm.example"], True, MAILBOX),
    ("mcafee", "Mail Administrator <postmaster@mcafee.example>", "Delivery Status",
     "Your message was not delivered.\n --- The following addresses had delivery problems ---\n\n<cora@mcafee.example>   (User unknown cora@mcafee.example)\n\n--------------Boundary-00=_00000000000000000000\n",
     ["cora@mcafee.example"], True, MAILBOX),
    ("mfilter ja", "Mailer Daemon <postmaster@mf-ja.example>", "\u914d\u4fe1\u5931\u6557",
     "\u4ee5\u4e0b\u306e\u30e1\u30fc\u30eb\u30a2\u30c9\u30ec\u30b9\u3078\u306e\u9001\u4fe1\u306b\u5931\u6557\u3057\u307e\u3057\u305f\u3002\n\n-------server message\n550 5.1.1 unknown user <dora@mf-ja.example>\n\n-------SMTP command\nRCPT TO:<dora@mf-ja.example>\n\n-------original message\n",
     ["dora@mf-ja.example"], True, MAILBOX),
    ("notes", "MAILER-DAEMON@notes.example", "Undeliverable message",
     "------- Failure Reasons  --------\n\nUser not listed in public Name & Address Book\nemil@notes.example\n\n\n------- Returned Message --------\n\n",
     ["emil@notes.example"], True, MAILBOX),
    ("opensmtpd", "Mailer Daemon <MAILER-DAEMON@openbsd.example>", "Delivery status notification: error",
     "    Hi!\n\n    This is the MAILER-DAEMON, please DO NOT REPLY to this email.\n\n    An error has occurred while attempting to deliver a message for\n    the following list of recipients:\n\nfrida@openbsd.example: 552 5.2.2 Mailbox full\n\n    Below is a copy of the original message:\n\n",
     ["frida@openbsd.example"], False, FULL),
    ("powermta", "<postmaster@pmta.example>", "Delivery report",
     "Hello, this is the mail server on pmta.example.\n\nI am sending you this message to inform you on the delivery status of a\nmessage you previously sent.  Immediately below you will find a list of\nthe affected recipients;  also attached is a Delivery Status Notification\n(DSN) report in standard format, as well as the headers of the original\nmessage.\n\n  <gero@pmta-rcpt.example>  delivery failed; will not continue trying\n",
     ["gero@pmta-rcpt.example"], None, ("other", "bad-mailbox", "policy-related", "message-expired")),
    ("surfcontrol", "Mail Administrator <postmaster@sc.example>", "Message could not be delivered",
     "Your message could not be sent.\n\nA transcript of the attempts to send the message follows.\nThe number of attempts made: 1\nAddressed To: hans@sc.example\n\nTue 04 Mar 2025 10:00:00\nFailed to send to identified host,\nhans@sc.example: [192.0.2.5], 550 hans@sc.example... No such user\n--- Message non-deliverable.\n",
     ["hans@sc.example"], True, MAILBOX),
    ("zoho", "<mailer-daemon@zoho.example>", "Undelivered Mail Returned to Sender",
     "This message was created automatically by mail delivery software.\nA message that you sent could not be delivered to one or more of its recipients. This is a permanent error.\n\nida@zoho-rcpt.example Invalid Address, ERROR_CODE :550, ERROR_CODE :5.1.1 <ida@zoho-rcpt.example>... User Unknown\n",
     ["ida@zoho-rcpt.example"], True, MAILBOX),
    ("groupwise", "Mailer-Daemon@gw.example", "Message status - undeliverable",
     "The message that you sent was undeliverable to the following:\n\tjan@gw.example (user not found)\n\nPossibly truncated original message follows:\n\n", ["jan@gw.example"], True, MAILBOX),
    ("gmail de", "Mail Delivery Subsystem <mailer-daemon@googlemail.example>", "Delivery Status Notification (Failure)",
     "** Adresse nicht gefunden **\n\nIhre Nachricht wurde nicht an karl@gm.example zugestellt, weil die Adresse nicht gefunden wurde oder keine E-Mails empfangen kann.\n\nDie Antwort des Remote-Servers lautet:\n550 5.1.1 The email account that you tried to reach does not exist.\n",
     ["karl@gm.example"], True, MAILBOX),
    ("gmail ja without reply", "Mail Delivery Subsystem <mailer-daemon@googlemail.example>", "Delivery Status Notification (Failure)",
     "** \u30a2\u30c9\u30ec\u30b9\u304c\u898b\u3064\u304b\u308a\u307e\u305b\u3093\u3067\u3057\u305f **\n\nlena@gm.example \u306b\u30e1\u30fc\u30eb\u3092\u914d\u4fe1\u3067\u304d\u307e\u305b\u3093\u3067\u3057\u305f\u3002\u30a2\u30c9\u30ec\u30b9\u304c\u898b\u3064\u304b\u3089\u306a\u3044\u304b\u3001\u30e1\u30fc\u30eb\u3092\u53d7\u4fe1\u3067\u304d\u307e\u305b\u3093\u3002\n",
     ["lena@gm.example"], True, MAILBOX),
    ("gmail pt full", "Mail Delivery Subsystem <mailer-daemon@googlemail.example>", "Delivery Status Notification (Failure)",
     "** Caixa de entrada do destinat\u00e1rio cheia **\n\nSua mensagem n\u00e3o foi entregue a mia@gm.example porque a caixa de entrada est\u00e1 cheia ou recebendo muitos e-mails no momento.\n",
     ["mia@gm.example"], False, FULL),
    ("m365 de", "Microsoft Outlook <postmaster@contoso.example>", "Unzustellbar: Ihre Angebote",
     "Fehler bei der Nachrichten\u00fcbermittlung an folgende Empf\u00e4nger oder Gruppen:\n\nnora@contoso.example (nora@contoso.example)\nIhre Nachricht wurde nicht zugestellt. Der Empf\u00e4nger wurde nicht gefunden.\n\nDiagnoseinformationen f\u00fcr Administratoren:\n\nGenerierender Server: AM0PR01.eurprd01.prod.exchangelabs.com\n\nnora@contoso.example\nRemote Server returned '550 5.1.10 RESOLVER.ADR.RecipientNotFound; Recipient nora@contoso.example not found by SMTP address lookup'\n\nUrspr\u00fcngliche Nachrichtenkopfzeilen:\n\n",
     ["nora@contoso.example"], True, MAILBOX),
    ("qmail es", "MAILER-DAEMON@qm.example", "failure notice",
     "Hola, este es el servidor de correo qm.example.\nNo se ha podido entregar su mensaje a las siguientes direcciones.\n\n<otto@qm.example>:\nLo siento, no existe ese buz\u00f3n. (#5.1.1)\n\n--- Debajo de esta l\u00ednea est\u00e1 una copia del mensaje.\n\n",
     ["otto@qm.example"], True, MAILBOX),
    ("163 zh", "Postmaster@netease.example", "\u7cfb\u7edf\u9000\u4fe1",
     "\u62b1\u6b49\uff0c\u60a8\u7684\u90ae\u4ef6\u88ab\u9000\u56de\u6765\u4e86\u2026\u2026\n\u539f\u90ae\u4ef6\u4fe1\u606f\uff1a\n\u65f6 \u95f4: 2025-03-04\n\u4e3b \u9898: Your weekly offers\n\u6536\u4ef6\u4eba: pia@netease.example\n\n\u9000\u4fe1\u539f\u56e0\uff1a\n\u6536\u4ef6\u4eba\u90ae\u4ef6\u5730\u5740\uff08pia@netease.example\uff09\u4e0d\u5b58\u5728\uff0c\u90ae\u4ef6\u65e0\u6cd5\u9001\u8fbe\u3002\nSMTP error, RCPT TO: 550 User not found: pia@netease.example\n",
     ["pia@netease.example"], True, MAILBOX),
    ("yandex ru", "MAILER-DAEMON <mailer-daemon@yandex.example>", "\u041d\u0435\u0434\u043e\u0441\u0442\u0430\u0432\u043b\u0435\u043d\u043d\u043e\u0435 \u0441\u043e\u043e\u0431\u0449\u0435\u043d\u0438\u0435",
     "\u0418\u0437\u0432\u0438\u043d\u0438\u0442\u0435, \u0432\u0430\u0448\u0435 \u043f\u0438\u0441\u044c\u043c\u043e \u043d\u0435 \u0443\u0434\u0430\u043b\u043e\u0441\u044c \u0434\u043e\u0441\u0442\u0430\u0432\u0438\u0442\u044c \u0430\u0434\u0440\u0435\u0441\u0430\u0442\u0443:\n\n<rita@yandex.example>: \u041f\u043e\u0447\u0442\u043e\u0432\u044b\u0439 \u044f\u0449\u0438\u043a \u043f\u0435\u0440\u0435\u043f\u043e\u043b\u043d\u0435\u043d\n\n",
     ["rita@yandex.example"], False, FULL),
    ("x4 text", "MAILER-DAEMON@x4.example", "failure notice",
     "We're sorry. There's a problem with the e-mail address(es) you're trying to send to. Please verify the address(es) and try again.\n\n<sara@x4.example>:\nThis user doesn't have a x4.example account (sara@x4.example) [0]\n\n--- Below the next line is a copy of the message.\n\n",
     ["sara@x4.example"], True, MAILBOX),
    ("mdaemon", "MDaemon at md.example <MDaemon@md.example>", "Warning: md.example - User unknown!",
     "The following recipient does not exist on this server:\n\n  tom@md.example\n\n--- Session Transcript ---\n RCPT To:<tom@md.example>\n 550 5.1.1 Recipient unknown <tom@md.example>\n", ["tom@md.example"], True, MAILBOX),
    ("mailenable", "MailEnable Postmaster <postmaster@me.example>", "Message Delivery Failure",
     "MailEnable: Message Delivery Failure.\n\nThe following recipient(s) could not be reached:\n\n\tRecipient: [SMTP:ulli@me.example]\n\tReason: Remote SMTP Server Returned: 550 5.1.1 User unknown\n\nMessage headers follow:\n",
     ["ulli@me.example"], True, MAILBOX),
    ("lotus delayed", "Mail Router <postmaster@lotus.example>", "DELAYED: Your weekly offers",
     "Your message\n\n  Subject: Your weekly offers\n\nhas not yet been delivered to:\n\n  viktor@lotus.example\n\nIt will be retried for the next 24 hours.\n", [], None, ()),
]  # fmt: skip
