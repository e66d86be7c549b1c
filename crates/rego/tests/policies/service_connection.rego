# Who watches asked for one of the connections that are watched.
package nsm

default valid = false

valid {
	own := input.spiffe_id_connection_map[input.service_spiffe_id]
	own[_] == input.selector_connection_ids[_]
}
