-- Orthanc: what a scanner sends goes on to the reader by STOW-RS; what the reader sends back does not.
function OnStoredInstance(instance, tags, metadata, origin)
  if tags['Modality'] == 'CR' or tags['Modality'] == 'DX' or tags['Modality'] == 'RF' then
    RestApiPost('/dicom-web/servers/cxr/stow', DumpJson({Resources = {instance}, Synchronous = false}, true))
  end
end
