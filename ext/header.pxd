"""The header functions that `ext.template` calls for each recipient."""

cpdef bytes unstructured(bytes name, str text)
cpdef bytes mailbox(bytes name, str display, bytes address)
cpdef check(str text)
